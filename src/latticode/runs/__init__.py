"""Actions on run folders, one file for each verb of the command line, and `Run`, a folder that is opened."""
