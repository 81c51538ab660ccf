"""What a person looks at: figures made from run directories."""
