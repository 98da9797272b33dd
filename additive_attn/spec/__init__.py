"""What every backend must compute; imports torch only."""
