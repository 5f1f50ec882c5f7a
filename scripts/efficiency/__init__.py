"""What a reducer saves: time, computation and memory."""
