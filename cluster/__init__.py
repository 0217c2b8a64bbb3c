"""A Ray cluster of rented Vast.ai machines: the provider Ray asks, the client it uses, the network between the nodes.

Nothing in this package imports torch: it runs on laptops and on the cheap head node.
"""
