"""What the machine is and can do: its facts, the memory a training takes, the speed to expect."""
