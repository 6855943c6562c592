"""How hard is this job, and which model should take it?"""
