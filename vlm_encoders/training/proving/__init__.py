"""What a run trains, said before it, proved in it, and examined without it."""
