"""What would a policy do with this trace?"""
