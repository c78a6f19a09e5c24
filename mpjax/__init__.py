from mpjax._autocast import autocast
from mpjax._markers import cast_inputs, keep_float32
from mpjax._policy import Policy
from mpjax._policy_map import PolicyMap
