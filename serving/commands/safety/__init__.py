"""Commands of the safety stage: judge, measure, review, export, take down."""
