"""What every measurement shares: where it ran, and how the forms of the same work take turns."""
