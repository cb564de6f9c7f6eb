"""What a step costs, the least time it can take, and an estimate of the time it will take on a GPU.

Knows the Plan, data sheets and the kernels' routing; runs nothing and measures nothing.
"""
