"""Publishing on the Hugging Face Hub; for maintainers, in a clone of the project."""
