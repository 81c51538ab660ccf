"""What the command line calls: each module adds its commands and prints what they answer."""
