#include "headkv-workers.h"

#include "ggml-backend.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#if !defined(_WIN32)
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

static bool is_reachable(const std::string & endpoint) {
    const size_t colon = endpoint.rfind(':');
    addrinfo hints = {};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo * found = nullptr;
    if (colon == std::string::npos || getaddrinfo(endpoint.substr(0, colon).c_str(), endpoint.substr(colon + 1).c_str(), &hints, &found) != 0) {
        return false;
    }
    bool res = false;
    const int fd = socket(found->ai_family, SOCK_STREAM, 0);
    const timeval limit = { 2, 0 };
    if (fd >= 0) {
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)); // of connect() too
        res = connect(fd, found->ai_addr, found->ai_addrlen) == 0;
        close(fd);
    }
    freeaddrinfo(found);
    return res;
}
#else
static bool is_reachable(const std::string &) { return false; }
#endif

static void on_abort(const char * message) {
    if (!strstr(message, "ggml-rpc")) { // not ours to say: as without us
        ggml_set_abort_callback(nullptr);
        const std::string said = message; // "FILE:LINE: .."
        const size_t end = said.find(": ");
        const size_t colon = end == std::string::npos ? end : said.rfind(':', end - 1);
        if (colon == std::string::npos) {
            ggml_abort(__FILE__, __LINE__, "%s", message);
        }
        ggml_abort(said.substr(0, colon).c_str(), atoi(said.c_str() + colon + 1), "%s", said.c_str() + end + 2);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(500)); // a process that ends closes one socket after the other
    std::string lost, all;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        const std::string endpoint = ggml_backend_dev_description(dev); // of a worker that is
        if (strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)), "RPC") != 0 || all.find(endpoint) != std::string::npos) {
            continue;
        }
        all += (all.empty() ? "" : ", ") + endpoint;
        if (!is_reachable(endpoint)) {
            lost += (lost.empty() ? "" : ", ") + endpoint;
        }
    }
    const char * text = strstr(message, ": ");
    fprintf(stderr, "%s\n", text ? text + 2 : message);
    if (all.empty()) { // upstream has named it
        fprintf(stderr, "--rpc: no worker was there: name HOST:PORT of one that 'pyheadkv rpc-worker' has started, several with commas between them\n");
        fflush(stderr);
        _Exit(1);
    }
    fprintf(stderr, "RPC worker %s: this program ends. What a worker had of the model and of the cache is gone: start it again, then this program\n",
            !lost.empty() ? (lost + " was lost").c_str() : ("of " + all + " ended the connection").c_str());
    fflush(stderr);
    _Exit(1);
}

void headkv_name_lost_workers() {
    ggml_set_abort_callback(on_abort);
}
