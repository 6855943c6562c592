"""What does the outside see?"""
