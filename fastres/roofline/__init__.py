"""The cost of a step, the least time that it can take, and an estimate of its time on a GPU.

Uses the Plan, data sheets and the kernels' routing. Runs nothing and measures nothing.
"""
