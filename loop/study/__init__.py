"""What looks at, or runs, many loops."""
