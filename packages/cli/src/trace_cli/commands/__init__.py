"""One file a command; each holds an object named ``command``."""
