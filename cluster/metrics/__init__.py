"""Every metric: its name, unit, help and labels. `gateway.py` and `router.py` have those of the two metrics ports.

Base units, the prefix mull_, bounded labels. No globals: whoever has figures passes them in.
"""
