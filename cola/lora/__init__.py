"""What is trained: layers that carry a low-rank link, how links start, and which layers of a model get them."""
