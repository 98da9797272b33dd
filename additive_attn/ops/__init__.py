"""One call of the operators: checked, differentiated, dispatched."""
