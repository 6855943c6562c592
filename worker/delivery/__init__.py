"""How does a job survive the death of the process that holds it?"""
