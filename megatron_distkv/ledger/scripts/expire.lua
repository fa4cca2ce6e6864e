-- limit -> {buried instance, ...}
return expire(number(ARGV[2]))
