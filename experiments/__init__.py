"""What is run: commands and configs."""
