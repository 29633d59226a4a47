"""Which rows are denoised next. Plain Python."""
