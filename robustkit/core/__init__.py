"""What everything stands on: threats, losses, random numbers, errors. It imports no other room."""
