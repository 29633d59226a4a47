"""Commands of the safety stage: check, measure, review, export, take down."""
