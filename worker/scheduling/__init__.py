"""Whose queue is served next?"""
