"""Bodies of requests as clients send them: pydantic models, one file per API.

A field that is not known is refused, since it might change the answer; HARMLESS ones are taken and left.
Values are not coerced: "1" is no number. What is beyond a type is checked where it is used, once: sampling
parameters by `SamplingParams`, messages by the chat template.
"""
