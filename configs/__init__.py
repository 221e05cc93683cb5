"""The cookbook: a chapter is a folder, a system is a file with a function `recipe`."""
