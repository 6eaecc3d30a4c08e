"""One adapter a file; each is the program of a process in the environment of its engine."""
