"""Pictures of a run, made from the files of its directory and never from a live object."""
