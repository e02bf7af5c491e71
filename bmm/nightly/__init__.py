"""What is done with a merge night after night: which experts there are, whether anything changed, what is better."""
