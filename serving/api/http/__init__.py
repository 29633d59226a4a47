"""HTTP itself: bodies, authentication, errors, events, pages."""
