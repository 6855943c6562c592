"""How does one job become one stored outcome?"""
