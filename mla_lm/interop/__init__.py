"""Models of other formats, and of other kinds of attention, to and from ours."""
