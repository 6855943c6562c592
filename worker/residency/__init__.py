"""Which models are loaded, and how do we change that?"""
