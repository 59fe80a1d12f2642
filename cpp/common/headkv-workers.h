// What is said when a worker of --rpc goes away.
#pragma once

// llama.cpp ends the process then, on a thread of its own: the last message names the worker and what to do, and the exit code is 1.
void headkv_name_lost_workers();
