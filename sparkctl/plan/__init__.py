"""What to train and how, with the reason of each choice and what it will cost."""
