"""What the command line does with run folders, one file per verb."""
