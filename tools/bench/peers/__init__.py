"""pst-ds beside what a user would take instead: speed, bytes and quality of each, in one process tree."""
