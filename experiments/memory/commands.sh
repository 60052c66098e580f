dtvla benchmark memory
