"""Judging writers: functions that put the keys and values of new tokens into the slots of a pool.

To be read in this order: codes, case, numbers, inputs, judge, report, cases, verify.
"""
