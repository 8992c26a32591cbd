from data import *
from data import augment, soft_targets, combine
