"""The methods inside of other people's training loops, one file per library."""
