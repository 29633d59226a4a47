"""What people decide: cases, held images, and the log of what reviewers did."""
