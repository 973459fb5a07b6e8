"""The same work as others write it, one library a file: each in the way that its documentation shows."""
