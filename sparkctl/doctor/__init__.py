"""What the machine at hand can do, what is wrong with it, and how to mend it."""
