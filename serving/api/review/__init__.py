"""Takedowns: recognising stored pictures, and what their removal does to files and jobs."""
