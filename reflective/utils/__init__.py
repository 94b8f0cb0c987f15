"""What every floor needs and no floor is about: arguments, files, conversations."""
