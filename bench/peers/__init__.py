"""mull beside the engines that people compare it with, on one checkpoint, threads and prompts, in turns.

The harness runs in our environment; each engine in a process of its own, most in an environment of their own. What
both sides import (`protocol`, `recorder`) needs nothing but the standard library.
"""
