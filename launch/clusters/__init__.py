"""Files that start a training run on machines that are rented: one template for each kind of cluster.

`mllm-jax launch KIND RECIPE --layout NAME` prints them.  They are whole: machines, environment, storage, command, what happens on
each exit code, logs.  Nothing is installed to print them, and nothing is started by printing them.
"""
