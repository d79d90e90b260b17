"""Kill, fill, lock, stop and damage runs, and count what was not refused or finished with the same numbers."""
