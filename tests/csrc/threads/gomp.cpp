// Stands in for libgomp under ThreadSanitizer, which does not know libgomp's barriers and would report a race at every
// region: the three functions that csrc/parallel.h makes GCC call, on threads that begin and end with the region. Compile it with
// -fvisibility=hidden, so that what is linked with it takes it and not the libgomp that torch has loaded.
#include <pthread.h>

#include <vector>

namespace {
struct Part {
  void (*body)(void*);
  void* data;
  int part, parts;
};
thread_local const Part* here = nullptr;

void* run(void* given) {
  here = static_cast<const Part*>(given);
  here->body(here->data);
  here = nullptr;
  return nullptr;
}
}  // namespace

extern "C" {
int omp_get_thread_num() { return here ? here->part : 0; }
int omp_get_num_threads() { return here ? here->parts : 1; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<Part> parts;
  for (unsigned part = 0; part < threads; ++part) parts.push_back({body, data, int(part), int(threads)});
  std::vector<pthread_t> started(threads);
  for (unsigned part = 1; part < threads; ++part) pthread_create(&started[part], nullptr, run, &parts[part]);
  const Part* outer = here;
  run(&parts[0]);
  here = outer;
  for (unsigned part = 1; part < threads; ++part) pthread_join(started[part], nullptr);
}
}
